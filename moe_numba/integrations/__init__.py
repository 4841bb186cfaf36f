"""Use from other libraries; one file each, which imports its library when it is imported itself."""
