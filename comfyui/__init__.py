"""ComfyUI nodes for shielded: keep a model away from chosen images, and make queued images differ (SPELL)."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES


class SpellExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return NODES


async def comfy_entrypoint() -> SpellExtension:
    return SpellExtension()
