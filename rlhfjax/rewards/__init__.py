"""What scores a response, and what labels several: models, rules, people and language models."""
