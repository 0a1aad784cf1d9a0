"""What the pictures of docs/ideas show, a file each: the quantities, then the drawing."""
