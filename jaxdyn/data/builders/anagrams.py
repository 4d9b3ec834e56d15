"""The rearrangement task as a TensorFlow Datasets builder."""

import tensorflow_datasets as tfds

from jaxdyn.data.anagrams import AnagramsConfig, anagrams


class Anagrams(tfds.core.GeneratorBasedBuilder):
    """`prompt`, `completion` and `letters` of `jaxdyn.data.anagrams`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, options: AnagramsConfig, **kwargs):
        self.options = options
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"prompt": text, "completion": text, "letters": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str):
        return enumerate(anagrams(self.options, split))
