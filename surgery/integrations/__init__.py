"""What is particular to other libraries."""
