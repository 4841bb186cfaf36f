"""What `moe-numba run` works on when it is given no files; README.md says where it comes from."""
