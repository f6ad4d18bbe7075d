"""Words of chest radiograph reports: what names a finding, what denies it, what doubts it.

A lexicon of our own. Which words belong to which class follows the published definition of the 14 CheXpert classes (Irvin et al. 2019);
the entries are regular expressions on lower-cased text, matched at the start of a word. Read by `evaluation.rule_labeler`.
"""

NO_FINDING = "No Finding"
DEVICES = "Support Devices"

# Entries that name a structure and no disease: what is said of it decides, so that "normal" denies and "stable" tells nothing.
STRUCTURES: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        r"cardio-? ?mediastin\w+",
        r"mediastinum",
        r"mediastinal (?:configuration|silhouettes?|borders?|width|shadow)",
        r"(?:pericardial|cardiopericardial) silhouettes?",
        r"contours?",
    ),
    "Cardiomegaly": (
        r"(?:the )?heart(?! failure| rate| valve| block| surgery| border| disease| tones?| monitor)",
        r"cardiac (?:size|shadow|contours?|silhouettes?|diameter)",
        r"cardiothoracic ratio",
    ),
    "Lung Opacity": (r"interstitial (?:lung )?markings?", r"reticular markings?"),
}

DISEASES: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (r"mediastinal (?:widening|enlargement|prominence)",),
    "Cardiomegaly": (
        r"cardiomegaly",
        r"cardiac enlargement",
        r"(?:enlarged|large) heart",
        r"(?:ventricular|atrial|biventricular|biatrial) enlargement",
    ),
    "Lung Lesion": (
        r"mass(?:es)?(?!ive)\b",
        r"mass-?like",
        r"(?:micro)?nodul(?:es?|ar (?:densit|opaci)\w+)",
        r"lump",
        r"(?:cavitary|lung|pulmonary|parenchymal) (?:\w+ )?lesions?",
        r"carcinomas?",
        r"neoplas\w+",
        r"tumou?rs?",
        r"metasta\w+",
    ),
    "Lung Opacity": (
        r"opaci\w+",
        r"air[- ]?space (?:disease|process)\w*",
        r"infiltrat\w+",
        r"(?:increased|hazy|patchy) densit\w+",
        r"decreased translucency",
        r"interstitial (?:pattern|thickening|lung disease|disease|process)",
        r"reticula\w+(?! markings?)",
        r"peribronchial thickening",
        r"(?:bronchial )?wall thickening",
        r"scar(?:s|ring)?\b",
        r"ground[- ]glass",
    ),
    "Edema": (
        r"o?edema\w*",
        r"heart failure",
        r"chf\b",
        r"volume overload",
    ),
    "Consolidation": (r"consolidat\w+",),
    "Pneumonia": (r"(?:broncho)?pneumonia\w*", r"infecti\w+"),
    "Atelectasis": (r"(?:micro)?atelect\w+", r"collaps\w+"),
    "Pneumothorax": (r"(?:hydro)?pneumothora\w+",),
    "Pleural Effusion": (r"effusions?", r"pleural fluid", r"(?:hydro|haemo|hemo)(?:pneumo)?thorax"),
    "Pleural Other": (
        r"pleural[- ](?:based )?(?:thickening|plaques?|scar\w*)",
        r"pleuro-?(?:parenchymal|pericardial) (?:scar\w*|thickening)",
        r"fibro(?:sis|thorax)",
    ),
    "Fracture": (r"fractur\w+",),
    DEVICES: (
        r"pace-?makers?",
        r"(?:dual[- ]chamber )?pacer\w*",
        r"picc\b",
        r"(?:central |venous |jugular |subclavian |femoral |port |arterial |monitoring |enteric )+lines?\b",
        r"lines?\b(?! of)",
        r"(?:\w+ )?tubes?\b",
        r"valves?\b",
        r"\w*catheter\w*",
        r"hardware",
        r"arthroplast\w+",
        r"markers?\b",
        r"(?:a?icd|lvad|iabp)s?\b",
        r"defib\w+",
        r"devices?\b",
        r"drains?\b",
        r"plates?\b(?!-?like)",
        r"screws?\b",
        r"cannula\w*",
        r"apparatus",
        r"coils?\b",
        r"support\b",
        r"equipment",
        r"medi-?ports?",
        r"port-?a-?caths?",
        r"(?:chest|infusion|subclavian|jugular) ports?\b",
    ),
}

# Signs that hint at a disease and do not name it: uncertain unless denied.
HINTS: dict[str, tuple[str, ...]] = {
    "Edema": (r"(?:vascular|pulmonary|venous) congestion", r"vascular prominence", r"indistinctness"),
}

# What reads like a finding and is none, or is a finding of another part of the body.
EXCLUDED: dict[str, tuple[str, ...]] = {
    "Lung Lesion": (r"calcified nodul\w+",),
    "Lung Opacity": (r"(?:pleural|pleuro-?parenchymal) scar\w*",),
    "Pleural Effusion": (r"pericardial effusions?", r"joint effusions?"),
    "Edema": (r"soft tissue edema",),
}

# Abnormal without being one of the 14 classes: enough to say that the report is not normal.
OTHER_FINDINGS = (
    *(
        r"emphysem\w+",
        r"blunt\w+",
        r"(?:hyper)?densit\w+",
        r"elevation",
        r"eventration",
        r"\w*scoliosis",
        r"degenerat\w+",
    ),
    *(
        r"(?:non-?)?calcifi\w+",
        r"hyper-?inflat\w+",
        r"hyperexpansion",
        r"bronchospasm",
        r"asthma\w*",
        r"hernia\w*",
        r"copd\b",
    ),
    *(
        r"interstitial markings",
        r"plaques?",
        r"osteophytosis",
        r"aortic disease",
        r"bronch(?:iol)?itis",
        r"airways disease",
    ),
    *(r"thickening", r"cephali[sz]ation", r"aspiration", r"bullae?", r"contusions?", r"athero\w+", r"osteopeni\w+"),
    *(
        r"metasta\w+",
        r"granulom\w+",
        r"pneumo(?:mediastinum|peritoneum)",
        r"osteodystrophy",
        r"cuffing",
        r"irregular lucenc\w+",
    ),
    *(r"inflam\w+", r"fissur\w+", r"hypertensi\w+", r"prominen\w+", r"kyphosis", r"bullets?", r"reticula\w+"),
    *(
        r"thoracentesis",
        r"volume loss",
        r"deformity",
        r"h(?:a)?ematomas?",
        r"h(?:a)?emorrhage",
        r"radi(?:o-?)?opaque",
        r"aerophagia",
    ),
    *(r"arthropathy", r"tracheostomy", r"defib\w+"),
)

# Where one statement ends and the next begins inside a sentence.
CLAUSE_BREAKS = (
    r"[;:]",
    r",? (?:but|however|although|though|except(?: for)?|aside from|apart from|other than|while|whereas|with the exception of) ",
    r", (?=(?:there|the|this|it|which|he|she) )",
    r",? and (?=there )",
    r", (?=(?:small|trace|tiny|mild|moderate|minimal)\b(?!.*\b(?:or|nor)\b))",
    r",? (?=with(?:out)? (?:no|evidence) )",
)

# A negating word reaches forward until one of these.
ENDS_NEGATION = r"\b(?:is|are|was|were|has|have|remains?|appears?|appear|persists?|there|which|with|due to|because)\b"

DENIED_BEFORE = (
    r"\bno(?:r|n)?\b(?! (?:significant |interval |appreciable |definite |substantial )*change)",
    r"\bwithout\b(?! (?:significant |interval |appreciable )*change)",
    r"\b(?:negative|unremarkable) for\b",
    r"\b(?:free|clear|absence|disappearance|resolution|removal|history|drainage|clearing) of\b",
    r"\brather than\b",
    r"\b(?:rules?|ruled|ruling) out\b",
    r"\bexclud(?:e|es|ing)\b",
    r"\b(?:not|n't|never)\b(?: \w+){0,2} (?:have|has|show|demonstrate|see|identify|suggest|seen|reveal)\b",
    r"\bdo(?:es)? not\b",
    r"\bneither\b",
    r"\b(?:resolved|removed|cleared|absent)\b",
    r"\bclear (?=(?:focal )?$)",
)
_SEEN = (
    "seen|identified|present|visuali[sz]ed|demonstrated|noted|evident|apparent|detected|appreciated|visible|suspected"
)
DENIED_AFTER = (
    # "not seen on the lateral view" tells where a finding is seen, not that it is not.
    rf"^[^,]*\b(?:not|no longer|never)\b (?:\w+ ){{0,2}}(?:{_SEEN})\b(?! (?:on|in) (?:the )?(?:prior|previous|earlier|lateral|frontal|pa|ap)\b)",
    r"^[^,]*\b(?:is|are|was|were|has|have)\b(?: (?!not)\w+){0,2} (?:absent|resolved|cleared|removed|excluded|ruled out)\b",
    r"^[^,]*\b(?:removed|unlikely)\b",
)
# Said of a structure, these deny its disease.
NORMAL = (
    r"\b(?:normal|normally|unremarkable|clear|negative)\b",
    r"\bwithin (?:the )?(?:\w+ )?limits\b",
    r"\bnot? (?:\w+ )?(?:enlarged|widened|dilated|enlargement|widening|increased)\b",
    r"\bno (?:\w+ )?(?:abnormalit(?:y|ies))\b",
    r"\btop normal\b",
)
DOUBTED_FIRST_BEFORE = (
    r"\b(?:cannot|can not|can't|could not|not)\b (?:\w+ ){0,3}(?:exclude[ds]?|rule[ds]? out|ruled out)\b",
    r"\bno (?:\w+ )?new\b",
)
DOUBTED_FIRST_AFTER = (
    r"^[^,]*\b(?:cannot|can not|can't|could not|not)\b (?:\w+ ){0,3}(?:excluded|ruled out)\b",
    r"^[^,]*\b(?:not|poorly|incompletely|suboptimally)\b (?:\w+ ){0,2}(?:evaluated|assessed)\b",
)
DOUBTED_BEFORE = (
    r"\b(?:possib(?:le|ly|ility)|presum(?:ed|ably)|questionabl[ey]|question|questioned|suspect(?:ed)?|suspicio(?:us|n)|maybe|perhaps)\b",
    r"\b(?:may|might|would|could)\b",
    r"\b(?:concern(?:ing)?|worrisome|correlate(?: clinically)?|evaluate) for\b",
    r"\b(?:suggestion|question|symptoms) of\b",
    r"\b(?:versus|vs\.?|and/or|or) (?:[\w-]+ ){0,3}$",
    r"\bdifferential\b",
    r"\bobscur\w+\b",
    r"\bsecondary to\b",
)
DOUBTED_AFTER = (
    r"^ (?:is|are|was|were)? ?(?:also )?(?:suspected|questioned|possible|questionable)\b",
    r"^(?: [\w-]+){0,3},? (?:versus|vs\.?|and/or|or)\b",
    r"\b(?:may|might|could|can)\b (?:\w+ )?(?:be present|have this appearance)\b",
    r"\b(?:obscured)\b",
)
STABLE = (
    r"\b(?:stable|unchanged|similar)\b",
    r"\bnot (?:\w+ ){0,2}changed\b",
    r"\b(?:no|without) (?:\w+ ){0,2}change\b",
    r"\bborderline\b(?! enlarge)",
)
ENLARGED = (r"\b(?:enlarge\w*|widen\w*|prominen\w+|large|dilat\w+|increased)\b",)

# Two habits of the CheXpert labeler, kept where its label files are the measure: every "plate" is a device, and a heart at "upper
# limits of normal" is enlarged unless "at" or "within" stands before it.
HABITS: dict[str, tuple[str, ...]] = {DEVICES: (r"(?:end[- ]?)?plates?(?:-?like)?\b",)}
UPPER_LIMIT = r"(?<!\bat )(?<!\bat the )(?<!\bwithin )(?<!\bwithin the )\bupper limits"
