"""Words of English, Spanish and Portuguese reports that the guards look for: findings, sides, denials, earlier images.

Patterns are for lower-case text without accents, and match from the start of a word. PadChest's reports are word stems, so endings are left
open. A lexicon of our own; it names what a rewritten report must not change, not everything a report can say.
"""

from __future__ import annotations

LANGUAGES = {"en": "English", "es": "Spanish", "pt": "Portuguese"}

# Finding -> its names, in the order of LANGUAGES.
FINDINGS: dict[str, tuple[str, str, str]] = {
    "pneumothorax": (r"(?:hydro)?pneumothora\w*", r"(?:hidro)?neumotora\w*", r"(?:hidro)?pneumotora\w*"),
    "effusion": (
        r"effusions?|pleural fluid|(?:hydro|hemo)thorax",
        r"derram\w*|(?:hidro|hemo)torax",
        r"derram\w*|(?:hidro|hemo)torax",
    ),
    "consolidation": (r"consolidat\w*", r"consolidac\w*|condensac\w*", r"consolidac\w*|condensac\w*"),
    "atelectasis": (r"atelecta\w*", r"atelecta\w*", r"atelecta\w*"),
    "edema": (r"o?edema\w*", r"edema\w*", r"edema\w*"),
    "cardiomegaly": (
        r"cardiomegal\w*|enlarged (?:heart|cardiac)|(?:heart|cardiac \w+)(?: size)? (?:is|appears|remains) (?:\w+ )?enlarged",
        r"cardiomegal\w*|(?:aument\w*|increment\w*) (?:del? )?(?:tamano|silueta|indice) (?:cardia\w*|cardiotorac\w*)",
        r"cardiomegal\w*|aument\w* (?:da )?(?:area|silhueta) cardiac\w*",
    ),
    "opacity": (
        r"opaci\w*|infiltrat\w*",
        r"opaci\w*|infiltr\w*|(?:aument\w*|increment\w*) de densidad",
        r"opaci\w*|infiltr\w*",
    ),
    "pneumonia": (r"(?:broncho)?pneumoni\w*", r"(?:bronco)?neumoni\w*", r"(?:bronco)?pneumoni\w*"),
    "nodule": (r"(?:micro)?nodul\w*", r"(?:micro)?nodul\w*", r"(?:micro)?nodul\w*"),
    "mass": (r"mass(?:es)?\b", r"masas?\b", r"massas?\b"),
    "metastasis": (r"metasta\w*", r"metasta\w*", r"metasta\w*"),
    "fracture": (r"fractur\w*", r"fractur\w*", r"fratur\w*"),
    "emphysema": (r"emphysem\w*", r"enfisem\w*", r"enfisem\w*"),
    "hyperinflation": (
        r"hyper-?(?:inflat|expan|aerat)\w*",
        r"hiper(?:insufl|inflac|aireac)\w*",
        r"hiper(?:insufl|inflac|aerac)\w*",
    ),
    "congestion": (r"congest\w*", r"congest\w*", r"congest\w*"),
    "scoliosis": (r"\w*scolio\w*", r"\w*escolio\w*", r"\w*escolio\w*"),
    "hernia": (r"hernia\w*", r"hernia\w*", r"hernia\w*"),
    "granuloma": (r"granulom\w*", r"granulom\w*", r"granulom\w*"),
    "calcification": (r"calcifi\w*", r"calcific\w*", r"calcific\w*"),
    "thickening": (r"thicken\w*", r"engrosa\w*", r"espessa\w*"),
    "scar": (r"scar\w*|fibro\w*", r"cicatri\w*|fibro\w*", r"cicatri\w*|fibro\w*"),
    "pacemaker": (r"pace-?makers?|pacers?\b", r"marcapas\w*", r"marca-?pass\w*"),
    "tube": (r"tubes?\b", r"tubos?\b", r"tubos?\b"),
    "catheter": (r"catheters?|picc\b", r"cateter\w*|picc\b", r"cateter\w*|picc\b"),
}

# Which sides a word names.
SIDES: dict[str, tuple[str, str, str]] = {
    "left": (r"left\b(?!-over)", r"izquierd\w*|izq\b", r"esquerd\w*"),
    "right": (r"right\b", r"derech\w*|dch[ao]?\b", r"direit\w*"),
    "both": (r"bilateral\w*|both\b", r"bilateral\w*|amb[ao]s\b", r"bilateral\w*|amb[ao]s\b"),
}

# Before a finding and within its clause, these deny it; ENDS cuts them off.
DENIED_BEFORE = (
    r"\b(?:no|not|without|nor|neither|negative for|(?:free|clear|absence|absent) of|rul\w+ out|exclud\w+)\b",
    r"\b(?:no|sin|ni|ausenci\w* de|libres? de|descart\w*|negativ\w* para)\b",
    r"\b(?:nao|sem|nem|ausenci\w* de|livres? de|descart\w*|negativ\w* para)\b",
)
DENIED_AFTER = (
    r"^[^,]*\b(?:not|no longer) (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|demonstrated|evident)\b|^[^,]*\b(?:is|are) absent\b",
    r"^[^,]*\bno (?:se )?(?:observ|identific|apreci|visualiz|evidenci)\w*|^[^,]*\bausentes?\b",
    r"^[^,]*\bnao (?:se )?(?:observ|identific|visualiz|evidenci)\w*|^[^,]*\bausentes?\b",
)
ENDS = (
    r"\b(?:but|however|although|though|except|is|are|was|were|has|have|there|which|with)\b",
    r"\b(?:pero|aunque|salvo|excepto|con|que)\b",
    r"\b(?:mas|porem|embora|exceto|com|que)\b",
)

# A finding said to be over, or to be of an earlier image: it may be left out, denied or kept.
GONE = (
    r"\b(?:resolved|resolution|resolving|cleared|clearing|no longer|removed|removal|previous(?:ly)?|prior)\b",
    r"\b(?:resuelt\w*|resoluci\w*|desaparici\w*|desapareci\w*|retirad\w*|ya no|previ[ao]s?|previamente|anterior\w*)\b",
    r"\b(?:resolvid\w*|resoluc\w*|desaparec\w*|retirad\w*|previ[ao]s?|previamente|anterior\w*)\b",
)

# What only makes sense beside an earlier image. "Stable" and "new" also have uses that do not.
PRIOR = r"\b(?:unchanged|stable|again|interval(?:ly)?|compar(?:ed|ison)|prior|previous(?:ly)?|since|new(?:ly)?|worsen\w*|improv\w+|resol(?:ved|ving)|increas(?:ed|ing)|decreas(?:ed|ing)|progress(?:ed|ing|ion)|persist\w*|no longer|redemonstrat\w+|has (?:developed|cleared))\b"
