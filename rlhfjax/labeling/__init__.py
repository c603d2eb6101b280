"""People in the loop: what labelers see, what they do, and the rows that training reads.

The stage `label` and the command `rlhfjax label` serve these pages. `store` keeps every action as
an event in SQLite, `tasks` says what a label is, `queue` which item is next, `agreement` how far
labelers agree, `export` which rows are written, `app` what is answered over HTTP. The extra `serve`
has what `store` and `app` import.
"""
