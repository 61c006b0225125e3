"""
The only room with a key in it.

The rest of the map follows in the order of the story.
"""
