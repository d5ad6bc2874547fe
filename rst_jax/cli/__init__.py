"""The words of the command: each a parser and what it does."""
