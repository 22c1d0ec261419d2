"""From a checkpoint on the disk to one that others find: its model card, and the way to a hub."""
