"""Directories in Hugging Face format: config.json and safetensors files, of which only what is asked for is read."""

import os
from pathlib import Path

from ._files import open_regular
from ._safetensors import MOST_JSON, Safetensors, parse_json
from .errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory by name, and its config.

    path: directory with config.json, and model.safetensors or model.safetensors.index.json with the files
    that it names, which must lie in the directory. Raises CheckpointError.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not os.path.isdir(self.path):  # Path.is_dir raises where it may not look
            raise CheckpointError(
                f"{path}: is no directory; a model has to be there already, for example by `hf download`"
            )
        self.config = read_json(self._inside("config.json"))
        self._shards = {}
        if os.path.lexists(self.path / INDEX):
            self._files = self._read_index()
        else:
            self._shards[SINGLE] = Safetensors(self._inside(SINGLE))
            self._files = dict.fromkeys(self._shards[SINGLE].entries, SINGLE)

    def _read_index(self):
        """File of each tensor."""
        path = self._inside(INDEX)
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{path}: must hold an object weight_map")
        for name, file in files.items():
            if not isinstance(file, str) or os.sep in file or not file.endswith(".safetensors"):
                where = f"is said to be in {file!r:.80}, which is no file beside it"
                raise CheckpointError(f"{path}: tensor {name:.200} {where}")
        return files

    def __contains__(self, name):
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def tensor(self, name):
        """The tensor as a read-only array mapped from its file. It must be of a floating-point dtype."""
        file = self._files[name]
        if file not in self._shards:
            self._shards[file] = Safetensors(self._inside(file))
        if name not in self._shards[file].entries:
            raise CheckpointError(f"{self.path / file}: has no tensor {name}, though the index says so")
        return self._shards[file].map(name)

    def _inside(self, name):
        """The file of that name, which must not be a link that leads out of the directory.

        But into blobs/ beside snapshots/, which is how Hugging Face's cache keeps the files of a model.
        """
        home = Path(os.path.realpath(self.path))
        try:
            target = Path(os.path.realpath(home / name))
        except ValueError as error:  # a character that no name of a file has
            raise CheckpointError(f"{self.path}: cannot hold a file {name!r:.80} ({error})") from None
        homes = [home]
        if home.parent.name == "snapshots":
            homes.append(home.parent.parent / "blobs")
        if target.parent not in homes:
            raise CheckpointError(f"{self.path / name}: is a link to {target}, which is not in the directory")
        return self.path / name


def read_json(path):
    """The object in a JSON file. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        values = parse_json(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error!s:.200})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values
