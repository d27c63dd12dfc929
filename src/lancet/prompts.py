"""Neutral beginnings: everyday text that leads nowhere in particular, so that what comes is the edit's doing.

Doses are chosen on CALIBRATION and reported on REPORT; no prompt is in both.
"""

from __future__ import annotations

CALIBRATION = (
    "Yesterday I saw",
    "She opened the book and began to read about",
    "On the table there was",
    "He could not stop thinking about",
    "The best thing about today is",
    "When I looked out of the window,",
    "They talked for a long time about",
    "It all started with",
    "In the afternoon we decided to",
    "I have always wanted to",
)
REPORT = (
    "I went to the grocery store to buy",
    "My friend told me that",
    "Last week we went to",
    "The first thing I noticed was",
    "There was a man who",
    "I would like to tell you about",
    "After dinner, everyone",
    "Once upon a time, there was",
    "The letter said that",
    "What I remember most is",
)
