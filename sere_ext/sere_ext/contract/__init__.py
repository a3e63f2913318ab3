"""What crosses a border between the three packages, written once: types, names, errors and rules. Pure but for files."""
