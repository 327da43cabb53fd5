"""Data: rows from files, chat rendering and labels, poisoning mixes, batches."""
