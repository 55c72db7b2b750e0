"""The data sets: one file each, or a file for several of one publisher, with READERS = {name: reader}."""
