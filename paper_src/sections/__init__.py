"""The sections of the paper: a file a notebook, same stem, with the rows of its tables and its figures."""
