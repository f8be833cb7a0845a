"""Which column of a table means what: by the names that people, annotation tools and public data sets give them.

A role (file, box number, label, patient, an edge of the box) has names, and weaker names that count where no name is
there. Names are compared without case, accents, spaces and marks: `Patient#`, `patient_id` and `Patient ID` are alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from builder.crops.problems import Problems
from builder.errors import BuilderError


@dataclass(frozen=True)
class Role:
    """What a column may mean: the names for it, and names that count where none of the others is there."""

    names: frozenset[str]
    weaker: frozenset[str] = frozenset()


def _role(names: str, weaker: str = "") -> Role:
    return Role(frozenset(names.split()), frozenset(weaker.split()))


_BEFORE = ("", "bbox", "box", "bb", "boundingbox", "roi")


def _edge(names: str) -> Role:
    """An edge: tools put 'bbox', 'box' or 'bb' before its name."""
    return Role(frozenset(before + name for before in _BEFORE for name in names.split()))


ROLES: Mapping[str, Role] = {
    "file": _role(
        "file filename image imagename imagefile imagefilename imgname imgfile photo photograph photoname photofile "
        "picture picturename dateiname bilddatei bildname nomfichier nomdufichier nomimage nomdelimage "
        "nombrearchivo nombredearchivo nombreimagen nomefile nomeimmagine",
        "path filepath imagepath imgpath img imageid photoid pictureid datei bild foto fichier archivo imagen immagine",
    ),
    "number": _role(
        "boundingboxnumber boundingboxno boundingboxid box boxnumber boxno boxid boxnr boxnum bboxid bboxnumber "
        "bboxno numerodeboite boxnummer numerocaja"
    ),
    "label": _role(
        "phase woundphase healingphase label class classname woundtype woundclass wundphase heilungsphase wundtyp "
        "phasecicatrisation fase faseherida",
        "category categoryname labelname type stage klasse classe clase etiqueta etiquette etichetta tipo typ",
    ),
    "patient": _role(
        "patient patientid patientno patientnr patientnum patientnumber patientcode patientkey patientidentifier "
        "patientname idpatient subject subjectid subjectno subjectnumber subjectcode idsubject subj subjid "
        "participant participantid participantno participantnumber participantcode proband probandid probandennummer "
        "person personid individual individualid patientenid patientennr patientennummer patientnummer "
        "patientencode numeropatient numerodepatient nopatient sujet idsujet paciente idpaciente pacienteid "
        "numeropaciente numerodepaciente sujeto paziente idpaziente pazienteid npatient patnr patid patno",
        "pid ptid ptno ptnr pt mrn medicalrecordnumber medicalrecordno hospitalnumber hospitalno casenumber caseno "
        "caseid case pat fallnummer fallnr recordid studyid clientid client nhsnumber nhi",
    ),
    "xmin": _edge("xmin minx left x1min xleft leftx x0 xstart startx xtl tlx topleftx links gauche izquierda sinistra"),
    "ymin": _edge("ymin miny top y1min ytop topy y0 ystart starty ytl tly toplefty oben haut arriba superior"),
    "xmax": _edge("xmax maxx right xright rightx x2 xend endx xbr brx bottomrightx rechts droite derecha destra"),
    "ymax": _edge("ymax maxy bottom ybottom bottomy y2 yend endy ybr bry bottomrighty unten bas abajo inferior basso"),
    "x": _role("x bboxx boxx bbx boundingboxx"),
    "y": _role("y bboxy boxy bby boundingboxy"),
    "xcenter": _edge("xcenter xcentre centerx centrex cx xc xmid"),
    "ycenter": _edge("ycenter ycentre centery centrey cy yc ymid"),
    "width": _edge("width w breite largeur ancho larghezza"),
    "height": _edge("height h hohe hoehe hauteur alto altura altezza"),
    "photowidth": _role("photow photowidth imagewidth imgwidth imgw imagew originalwidth"),
    "photoheight": _role("photoh photoheight imageheight imgheight imgh imageh originalheight"),
}  # fmt: skip

# How the four numbers of a box are written, in the order in which the roles are looked for.
CORNERS, CORNER_AND_SIZE, CENTRE_AND_SIZE = "corners", "corner and size", "centre and size"
LAYOUTS: Sequence[tuple[str, tuple[str, str, str, str]]] = (
    (CORNERS, ("xmin", "ymin", "xmax", "ymax")),
    (CORNER_AND_SIZE, ("xmin", "ymin", "width", "height")),
    (CORNER_AND_SIZE, ("x", "y", "width", "height")),
    (CENTRE_AND_SIZE, ("xcenter", "ycenter", "width", "height")),
)

_PATIENT_STEMS = (
    "patient", "pazient", "pacient", "subject", "sujet", "proband", "participant", "person", "individual",
    "medicalrecord", "mrn", "hospitalnum", "hospitalno", "hospitalid", "chartno", "chartnum", "dossier", "historia",
    "cartella", "volunteer", "donor", "animal", "mouse",
)  # fmt: skip
_ATTRIBUTE_WORDS = (
    "age sex gender height weight bmi ethnicity race position side count consent "
    "alter geschlecht grosse gewicht sexe poids edad sexo peso eta"
)
_ATTRIBUTES = frozenset(_ATTRIBUTE_WORDS.split())


def plain(name: str) -> str:
    """A column's name without case, accents, spaces and marks: letters and digits only."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return re.sub(r"[^\w]|_", "", "".join(mark for mark in decomposed if not unicodedata.combining(mark)))


def looks_like_patient(name: str) -> bool:
    """Whether a column seems to say whose photograph it is, though its name is none of the known ones."""
    words = {plain(word) for word in re.split(r"[^\w]|_", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))}
    return any(stem in plain(name) for stem in _PATIENT_STEMS) and not words & _ATTRIBUTES


def _names(header: Iterable[str], names: frozenset[str]) -> list[int]:
    return [position for position, name in enumerate(header) if plain(name) in names]


class Columns:
    """Where the roles stand in a header.

    Args:
        header: the column names as written.
        chosen: role -> the name of its column, or 'none': the user's choice, which counts where this table has it.
        table: the table's name, for messages.
    """

    def __init__(self, header: Sequence[str], chosen: Mapping[str, str], table: str) -> None:
        self.header, self.chosen, self.table = list(header), chosen, table

    def find(self, role: str) -> int | None:
        """The position of a role's column, or None.

        Raises:
            BuilderError: several columns fit, or one that looks like a patient's is not known as such.
        """
        if self.chosen.get(role, "").casefold() == "none":
            return None
        if role in self.chosen and (position := self._chosen(role)) is not None:
            return position
        known = ROLES[role]
        fits = _names(self.header, known.names) or _names(self.header, known.weaker)
        if role in ("xmin", "xmax", "ymin", "ymax"):
            fits = fits or self._numbered(role)
        if role == "patient" and not fits:
            fits = [position for position, name in enumerate(self.header) if looks_like_patient(name)]
            if fits:
                raise BuilderError(
                    f"{self.table}: {self._quoted(fits)} looks like the patient's column",
                    f"say which column names the patient: --column patient='{self.header[fits[0]]}', "
                    "or --column patient=none where none does",
                )
        if len(fits) > 1:
            raise BuilderError(
                f"{self.table} has several columns for {_TITLES.get(role, role)}: {self._quoted(fits)}",
                f"choose one with --column {role}='{self.header[fits[0]]}', or rename the others",
            )
        return fits[0] if fits else None

    def layout(self) -> tuple[str, tuple[str, str, str, str]] | None:
        """How boxes are written in this table, with the four roles that stand there; None without a box."""
        for layout, roles in LAYOUTS:
            if all(self.find(role) is not None for role in roles):
                return layout, roles
        return None

    def _numbered(self, role: str) -> list[int]:
        """x1 is the left edge, but the right one beside x0."""
        axis, end = role[0], role[1:]
        if end == "max" and not _names(self.header, ROLES[f"{axis}min"].names):
            return []
        return _names(self.header, frozenset(f"{before}{axis}1" for before in _BEFORE))

    def _chosen(self, role: str) -> int | None:
        """The position of the column that the user chose for a role; None where this table has none of that name."""
        wanted = self.chosen[role]
        fits = [position for position, name in enumerate(self.header) if name == wanted]
        fits = fits or _names(self.header, frozenset({plain(wanted)}))
        if len(fits) > 1:
            raise BuilderError(f"{self.table} has {len(fits)} columns named '{wanted}'", "rename all but one")
        return fits[0] if fits else None

    def _quoted(self, positions: Sequence[int]) -> str:
        return " and ".join(f"'{self.header[position]}'" for position in positions)


_TITLES = {"file": "the file name", "number": "the box's number", "label": "the label", "patient": "the patient"}


def spelled(role: str) -> str:
    """A role's plainest names, for messages."""
    return {
        "file": "'filename' or 'file' or 'image'",
        "label": "'phase' or 'label' or 'class' or 'wound_type'",
        "box": "'xmin', 'ymin', 'xmax', 'ymax' (or x, y, width, height)",
    }.get(role, f"'{role}'")


def require_known_columns(chosen: Mapping[str, str], headers: Iterable[Sequence[str]], problems: Problems) -> None:
    """Note choices (role -> column name) that name no role, or a column that stands in none of the tables."""
    there = {plain(name): name for header in headers for name in header}
    for role, name in chosen.items():
        if role not in ROLES:
            problems.add(f"--column {role}={name}: there is no role '{role}'", f"the roles are: {', '.join(ROLES)}")
        elif name.casefold() != "none" and plain(name) not in there:
            listed = ", ".join(there.values()) or "none"
            problems.add(f"--column {role}={name}: no table has a column '{name}'", f"their columns are: {listed}")
