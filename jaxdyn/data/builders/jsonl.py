"""Any JSONL file as a TensorFlow Datasets builder."""

import json

import tensorflow_datasets as tfds

from jaxdyn.data.jsonl import JsonlFile, read_jsonl


class Jsonl(tfds.core.GeneratorBasedBuilder):
    """The rows of one file, each stored whole as JSON, since a row may hold any fields."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, options: JsonlFile, **kwargs):
        self.options = options
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"json": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, row in enumerate(read_jsonl(self.options)):
            yield index, {"json": json.dumps(row)}
