"""Encoders that learn from images alone, before any label is seen: which images, how they are changed, what is learned.

One trainer does it: that of `autoseg.training`, with tasks of this room.
"""
