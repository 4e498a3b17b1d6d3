"""Everything two processes of the server say to each other, and the memory they share."""
