"""What a surgeon does; one file a procedure."""
