"""L2, the fleet: where sequences go (`placement`), and later which roles, moves and sizes it takes."""
