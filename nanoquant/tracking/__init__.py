"""The record of a run: a folder beside the checkpoint, and loggers that show it elsewhere."""
