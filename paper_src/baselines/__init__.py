"""Other ways to a smaller or faster model, a file a kind; no function changes the model it is given."""
