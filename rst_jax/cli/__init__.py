"""The words of the command, beside `draw`: each a parser and what it does."""
