"""Stages and artifacts: knows files, not clusters or trackers."""
