"""Every data set of the table as a TensorFlow Datasets builder."""

import itertools
from typing import Any

import tensorflow_datasets as tfds

from jaxdyn.data.public import PublicFiles
from jaxdyn.data.source import DataSet


class Table(tfds.core.GeneratorBasedBuilder):
    """The examples of one data set of `jaxdyn.data.source.SETS`."""

    def __init__(self, name: str, data_set: DataSet, options: Any, **kwargs):
        self.name, self.data_set, self.options = name, data_set, options
        self.VERSION = tfds.core.Version(data_set.version)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        kinds: dict[type, Any] = {str: text, list: tfds.features.Sequence(text)}
        columns = {column: kinds[kind] for column, kind in self.data_set.columns.items()}
        features = tfds.features.FeaturesDict(columns)
        # Older data of one's own files have none, which is an error where one is declared.
        told = tfds.core.MetadataDict() if isinstance(self.options, PublicFiles) else None
        return tfds.core.DatasetInfo(builder=self, features=features, metadata=told)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.data_set.splits}

    def _generate_examples(self, split: str):
        examples = iter(self.data_set.generate(self.options, split))
        for number in itertools.count():
            try:
                yield number, next(examples)
            except StopIteration as end:
                if end.value:
                    self.info.metadata.update(end.value)
                return
