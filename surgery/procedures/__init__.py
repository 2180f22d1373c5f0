"""What a surgeon does; one file a procedure, a folder for those of one purpose."""
