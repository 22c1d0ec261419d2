"""Damage to folders, by a random generator: other kinds of files, and files that do not belong there."""

import os
import shutil


def other_kind(file, rng):
    """A file that is gone, empty, a folder, a pipe, or a link to what is no such file."""
    content = file.read_bytes()
    file.unlink()
    how = rng.randrange(8)
    if how == 1:
        file.touch()
    elif how == 2:
        file.mkdir()
    elif how == 3:
        os.mkfifo(file)
    elif how in (4, 5, 6):
        file.symlink_to(
            rng.choice(("/dev/zero", "/dev/null", file.name, "..", "nowhere", "config.json"))
        )
    elif how == 7:  # the same content behind a link is as good
        hidden = file.with_name(".elsewhere")
        hidden.write_bytes(content)
        file.symlink_to(hidden.name)


def extra(folder, rng):
    """One more file, such as other programs leave or an attacker would."""
    name = rng.choice(
        (
            *(
                "model.safetensors",
                "model.safetensors.index.json",
                "pytorch_model.bin",
                "adapter_config.json",
            ),
            *(
                "adapter_model.safetensors",
                "modeling_x.py",
                "generation_config.json",
                "model-00009-of-00009.safetensors",
            ),
        )
    )
    file = folder / name
    if file.exists():
        return
    if rng.random() < 0.5:
        shutil.copyfile(rng.choice(sorted(f for f in folder.iterdir() if f.is_file())), file)
    else:
        file.write_bytes(rng.choice((b"", b"{}", b"[", b"\0" * 100, b'{"weight_map": {}}')))
