"""One projection of a teacher's width from start to end: is it possible, what does the data say, the tensors."""

from __future__ import annotations

from hf_distill.errors import TeacherError
from hf_distill.students.calibration import Calibration
from hf_distill.students.components import Components
from hf_distill.students.layout import Layout
from hf_distill.students.projection import Projected, check_projection, projected
from hf_distill.students.sizes import along, changed
from hf_distill.students.streams import Stream
from hf_distill.students.thinner import built
from hf_distill.students.ties import without_ties


class Rotation:
    """Made and checked before the data is read; `components` see the data; then `projected` gives the tensors.

    The config of the layout is that of a model with a head of its own, where the teacher's was tied and a config can
    say so.
    """

    def __init__(self, calibration: Calibration, layout: Layout, stream: Stream, width: int) -> None:
        self.teacher, self.stream, self.width = calibration.teacher, stream, width
        if layout.head_setting is None:
            raise TeacherError(
                f"narrow: width='projection': {type(self.teacher.config).__name__} cannot say how large a head is, so "
                "its heads follow hidden=, and no width can be tried by itself. Say width='importance'."
            )
        self.apart = stream.tied(self.teacher)
        if self.apart:
            layout.config = without_ties(layout.config)
        settings = layout.sizes["hidden"].settings
        new = {one: width for main in settings for one in (main, *along("hidden", main, layout.config))}
        config = changed(layout.config, new)
        self.factors = check_projection(
            self.teacher, stream, lambda: built(self.teacher, config, self.apart), width, calibration.first
        )
        self.components = Components(self.teacher, stream.norms, stream.width)

    def projected(self) -> Projected:
        """The teacher's tensors in the basis that the data gave."""
        basis, share = self.components.leading(self.width)
        parameters = self.teacher.named_parameters(remove_duplicate=False)
        tensors = {name: parameter.detach() for name, parameter in parameters}
        return Projected(projected(tensors, self.stream, basis, self.factors), share, self.apart)
