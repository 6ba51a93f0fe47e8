"""The reader's own model, cut by one command: ``./reproduce.sh cut``, ``cut-layers``, or notebook 10."""
