"""Fast twins of `cells`. They never import it: an error can't hide in shared code."""
