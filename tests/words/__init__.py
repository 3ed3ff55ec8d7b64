"""Methods of a few lines, each of which needs a word; every interpreter runs the same ones."""
