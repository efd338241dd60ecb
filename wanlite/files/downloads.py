"""The first bytes of a file -> what a download left in its place, and what to do."""

_FIRST_BYTES = [
    (magic, f"it is {found}, not what its name promises: {remedy}")
    for magic, found, remedy in (
        (b"GGUF", "GGUF", "download the safetensors file"),
        (b"\x89HDF", "HDF5", "download the safetensors file"),
        (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
        (b"Rar!", "a RAR archive", "unpack it"),
        (b"\x1f\x8b", "a gzip archive", "unpack it"),
        (b"\xfd7zXZ", "an xz archive", "unpack it"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    )
]
_PICKLES = (b"PK\x03\x04", b"\x80")


def find_replacement(first_bytes: bytes, is_safetensors: bool = False) -> str | None:
    """Describe a file that is not what its name promises, by its first 64 bytes; None if they show nothing.

    `is_safetensors` is for files of that name, in which a pickle is a replacement too.
    """
    if is_safetensors and first_bytes.startswith(_PICKLES):
        return (
            "it is a pickle, not what its name promises, and pickles are never opened: "
            "download the safetensors file"
        )
    if first_bytes.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: run `git lfs pull` in that folder"
    if first_bytes.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "it is a web page: download the file again"
    return next((found for magic, found in _FIRST_BYTES if first_bytes.startswith(magic)), None)
