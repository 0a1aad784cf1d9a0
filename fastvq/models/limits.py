"""Far beyond any use; what lies above is a mistake, or a damaged file, that would cost hours or all memory."""

LARGEST = 2**24
LARGEST_KERNEL = 255
MOST_LAYERS = 10_000
MOST_LEVELS = 16
MOST_POSITIONS = 2**22
