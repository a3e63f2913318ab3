"""The tests, one folder for each thing that they need (`tests/run`)."""
