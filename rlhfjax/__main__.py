from rlhfjax.main import main

main()
