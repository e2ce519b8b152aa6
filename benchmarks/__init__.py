"""Measurements that anyone can repeat: each file is one command, RESULTS.md what it printed, when and where."""
