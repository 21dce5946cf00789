"""Score the images of a dataset and compare methods in a table; like generation, it runs on `job`."""
