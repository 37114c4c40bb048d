"""One file a recipe: the prompt format and its parser, two halves of one codec."""
