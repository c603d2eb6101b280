"""A small world of stories, on which the studies run: tfds:stories and gold:stories."""
