"""How many requests a server can take at a time, found from what it does with them."""
