"""A page to play with: a model that learns from a few drawings, points or rows, and says how sure it is.

``ibaml playground`` serves it to this machine alone. Each tab is one file, whose ``answer`` is a function of what the
page asks: ``draw``, ``curve``, ``table``, ``model``; ``server`` passes the one to the other, ``page/`` is what the
browser gets, ``models/`` what ``train`` made.
"""
