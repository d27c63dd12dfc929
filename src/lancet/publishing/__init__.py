"""Trained SAEs as a repository of the model hub: gathered and checked, described, and sent."""
