"""What the method stands on: files written whole, pinned downloads, resumable trainings, many processes."""
