"""Wheels made by hand, as a package index would serve them."""

import hashlib
import zipfile


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_package(index, name="tiny-model", version="1.2", members=None):
    stem = f"{name.replace('-', '_')}-{version}"
    facts = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{stem}.dist-info/RECORD": "",
    }
    return make_wheel(index / f"{stem}-py3-none-any.whl", facts | (members or {"tiny_model/m.gguf": b"GGUF"}))
