"""The options that say where on the Hub a model goes, of every command that uploads one."""

from dataclasses import dataclass

from ldae.options.declaration import option

HUB = "Hub"


@dataclass
class HubArguments:
    hub_model_id: str | None = option(
        None, "Repository to upload to, as org/name; by default the name of the folder in your own account.", group=HUB
    )
    hub_branch: str | None = option(
        None, "Branch to upload to, which is made if there is none; by default main.", group=HUB
    )
    hub_tag: str | None = option(None, "Tag that the upload's commit is given. A tag that is there stays.", group=HUB)
    hub_private: bool = option(
        False, "Make a new repository private. Nothing is uploaded to one that is public.", group=HUB
    )
