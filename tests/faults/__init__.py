"""Memory that ends at any one allocation, of any operation: no wrong weights, no wrong pictures, no misleading message."""
