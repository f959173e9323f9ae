"""What ModelCache is compared with: the least that could move the same bytes, tuned as well as we know how."""
