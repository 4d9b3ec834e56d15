"""The TensorFlow Datasets builder; it is imported when a data set is first used."""

import tensorflow_datasets as tfds

# Building takes a second: its bars would only break up the run's own progress display.
tfds.disable_progress_bar()
