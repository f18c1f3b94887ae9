"""A hook of mkdocs: a page for each folder that has no README, so that links to folders work as on GitHub."""

from pathlib import PurePosixPath

from mkdocs.structure.files import File


def on_files(files, config):
    """Adds FOLDER/index.md, a list of what the folder holds, wherever there is none."""
    held: dict[PurePosixPath, set[str]] = {}
    for file in (file for file in files if file.src_dir == config.docs_dir):  # the others are the theme's
        path = PurePosixPath(file.src_uri)
        for folder in path.parents:
            held.setdefault(folder, set()).add(path.relative_to(folder).parts[0])
    indexed = {folder: "README.md" if "README.md" in names else "index.md" for folder, names in held.items()}
    for folder, names in held.items():
        if names.isdisjoint({"README.md", "index.md"}):
            links = [
                f"- [`{name}/`]({name}/{indexed[folder / name]})" if folder / name in held else f"- [`{name}`]({name})"
                for name in sorted(names)
            ]
            page = File.generated(config, str(folder / "index.md"), content="\n".join([f"# {folder}", "", *links]))
            files.append(page)
    return files
