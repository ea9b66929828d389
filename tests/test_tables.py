"Who is one patient, and which column is which: every way in which people write a table"
import json
import logging

import numpy as np
import pydicom
import pytest
from PIL import Image

from anomdx.datasets import TableData, check_table, load_table, read_table
from anomdx.loaders import DataError, keyed_hash
from anomdx.tables import csv_rows, name_columns
from scans import image_header

PATIENTS = ("patient", "Patient", "patient_id", "PatientID", "Patient ID", "PATIENT-ID", "patient_name",
            "Patient No.", "anon_patient_id",
            "subject", "Subject", "subject_id", "SubjectID", "subj_id", "case", "case_id", "Case ID",
            "participant_id", "person_id", "pid", "MRN")


@pytest.fixture
def cohort(tmp_path):
    "12 patients with 4 pictures each; the last 3 are anomalous"
    for p in range(12):
        for s in range(4):
            Image.fromarray(np.full((8, 8), 4 * p + s, np.uint8)).save(tmp_path/f"p{p:02d}_{s}.png")
    return tmp_path


def write(folder, header, line):
    "A CSV with a line for each picture; `line` gets its file, label and patient"
    rows = [line(f"p{p:02d}_{s}.png", int(p >= 9), f"Doe^{p:03d}") for p in range(12) for s in range(4)]
    (folder/"t.csv").write_text("\n".join((header, *rows)))
    return folder/"t.csv"


@pytest.mark.parametrize("name", PATIENTS)
def test_patient_columns(cohort, name):
    table = load_table(TableData(str(write(cohort, f"path,label,{name}", lambda *v: ",".join(map(str, v))))))
    assert table.patient.nunique() == 12 and table[table.split
        != ""].groupby("patient").split.nunique().max() == 1
    assert set(table.patient) == {keyed_hash(f"Doe^{p:03d}") for p in range(12)}
    assert not table.drop(columns="patient").astype(str).apply(lambda c: c.str.contains("Doe")).any().any()
    assert table.attrs["told"] == ([] if name == "patient" else [f"patient is read from the column {name!r}"])


@pytest.mark.parametrize("name", ("study_id", "StudyInstanceUID", "AccessionNumber", "scan_id", "visit",
                                  "session", "patient_age", "id", "site"))
def test_other_columns_are_no_patients(cohort, name, caplog):
    path = write(cohort, f"path,label,{name}", lambda *v: ",".join(map(str, v)))
    with caplog.at_level(logging.INFO, "anomdx"):
        table, again = read_table(path), read_table(path)
    assert table.patient.nunique() == 48 and len(again) == 48
    said = [r.getMessage() for r in caplog.records]
    # said once
    assert len(
        said) == 1 and "nothing says who is one patient, each of the 48 scans counts as its own" in said[0]
    assert "Doe" not in caplog.text


@pytest.mark.parametrize("header,line,asks", [
    ("path,label,pateint", "{0},{1},{2}", "did you mean 'pateint'? Rename it to 'patient'"),
    ("path,label,subjekt", "{0},{1},{2}", "did you mean 'subjekt'"),
    ("path,label,subject,case", "{0},{1},{2},{0}", "could be read from the columns 'subject' and 'case', "
        "which differ"),
    ("path,label,maks", "{0},{1},{0}", "no column 'mask', did you mean 'maks'"),
    ("path,label,partition", "{0},{1},Training", "no column 'split', did you mean 'partition'"),
    ("path,label,Split", "{0},{1},Train", "its split is not train, val, test or empty, did you mean 'train'"),
    ("path,diagnosis", "{0},{1}", "needs a column 'label'"),
    ("path,class", "{0},sick", "no column 'label', did you mean 'class'"),
    ("file,image,label", "{0},x{0},{1}", "the path could be read from the columns 'file' and 'image', "
        "which differ")])
def test_what_is_unclear_is_asked(cohort, header, line, asks):
    with pytest.raises(DataError) as e: read_table(write(cohort, header, lambda *v: line.format(*v)))
    assert asks in str(e.value) and "Doe" not in str(e.value)


def test_every_column_under_another_name(cohort):
    table = read_table(write(cohort, "File Name;Class;Case ID;Segmentation;Subset",
                             lambda f, l, p: f"{f};{l};{p};{f if l else ''};{'test' if l else 'train'}"))
    assert (table.label.sum(), table.patient.nunique(), (table["mask"] != "").sum(),
            (table.split == "test").sum()) == (12, 12, 12, 12)
    assert len(table.attrs["told"]) == 5


def test_case_that_is_a_status_stays_a_column(cohort):
    table = read_table(write(cohort, "path,label,case,fold,seg",
                             lambda f, l, p: f"{f},{l},{l},3,{'yes' if l else 'no'}"))
    assert table.patient.nunique() == 48 and set(table.case) == {0,
        1} and set(table.split) == {""} == set(table["mask"])


def test_query_on_a_renamed_column_still_works(cohort):
    path = write(cohort, "path,label,Split,Patient",
                 lambda f, l, p: f"{f},{l},{'test' if l else 'train'},{p}")
    cfg = TableData(str(path), where="Split == 'train'")
    with pytest.raises(DataError, match="no healthy scan in split 'val'"): load_table(cfg)
    assert len(read_table(write(cohort, "path,Class", lambda f, l, p: f"{f},{l}"), healthy="Class == 0",
                          anomalous="Class == 1")) == 48


def test_some_rows_without_patient(cohort):
    table = read_table(write(cohort, "path,label,subject", lambda f, l, p: f"{f},{l},{'' if l else p}"))
    assert table.patient.nunique() == 9 + 12
    assert table.attrs["told"][-1].startswith("12 of 48 scans have no patient, each counts as its own; if some")


@pytest.mark.parametrize("text,names", [
    ('path,label,"a;b;c;d"\n0.png,0,x\n', ["path", "label", "a;b;c;d"]), ('path;label;"a,b,c,d"\n0.png;0;x\n',
    ["path", "label", "a,b,c,d"]),
    ("path\tlabel\tnote, free; text, more\n0.png\t0\tx\n", ["path", "label", "note, free; text, more"]),
    ("\ufeffpath;label\r\n0.png;0\r\n", ["path", "label"]), ('"path","label"\n"0.png","0"\n',
    ["path", "label"]),
    ('Filename;PatientID;"x,y,z,w"\n0.png;1;2\n', ["Filename", "PatientID", "x,y,z,w"])])
def test_separator(tmp_path, text, names):
    (tmp_path/"t.csv").write_text(text)
    assert csv_rows(tmp_path/"t.csv").columns.tolist() == names


@pytest.mark.parametrize("data", [b"path,label\n0.png,h\xf4pital\n",
                                  "path\tlabel\n0.png\t0\n".encode("utf-16"), b"path,label\n0.png,TRUE\n",
                                  b"path,label\n0.png,\n"])
def test_refusals_stay(tmp_path, data):
    (tmp_path/"t.csv").write_bytes(data)
    with pytest.raises(DataError): read_table(tmp_path/"t.csv")


def dicom_table(folder, column, ids):
    "A CSV of single DICOM pictures whose headers name these patients; without suffix, in folders and as .dcm"
    lines = [f"path,label{',' + column[0] if column else ''}"]
    for i, patient in enumerate(ids):
        d = image_header(PatientID=patient, Rows=4, Columns=4, PixelData=bytes(32),
                         SOPInstanceUID=f"1.2.{i + 1}", SeriesInstanceUID=f"1.3.{i + 1}")
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
        name = (f"{i}.dcm", f"IM{i:04}", f"scan.{i}/a.dcm")[i % 3]
        (folder/name).parent.mkdir(exist_ok=True); d.save_as(folder/name, enforce_file_format=True)
        lines.append((f"scan.{i}" if i % 3 == 2 else name) + ",0" + (f",{column[1][i]}" if column else ""))
    (folder/"t.csv").write_text("\n".join(lines))
    return folder/"t.csv"


def test_headers_are_asked(tmp_path):
    table = read_table(dicom_table(tmp_path, None, ["Doe1", "Doe1", "Doe2", "Doe2", "Doe1", ""]))
    # as of a DICOM tree
    assert table.patient[:5].tolist() == [keyed_hash(keyed_hash(p)) for p in ("Doe1", "Doe1", "Doe2",
        "Doe2", "Doe1")]
    read, alone = table.attrs["told"]
    assert read == "the patient of 5 of 6 scans is read from DICOM headers, 2 in all"
    assert alone.startswith("1 of 6 scans have no patient, each counts as its own")


def test_headers_fill_a_column(tmp_path):
    table = read_table(dicom_table(tmp_path, ("PatientID", ["Doe1", "", "Doe2", ""]),
                                   ["Doe1", "Doe1", "Doe2", "Doe2"]))
    assert table.patient.tolist() == [keyed_hash(p) for p in ("Doe1", "Doe1", "Doe2", "Doe2")]


def test_decathlon_names_its_patients(cohort):
    items = [{"image": f"p{p:02d}_{s}.png", "subject": f"Doe{p}", "fold": s, "label": 0} for p in range(12)
             for s in range(4)]
    (cohort/"list.json").write_text(json.dumps(dict(training=items)))
    table = read_table(cohort/"list.json", healthy="fold < 4")
    assert table.patient.nunique() == 12 and set(table.split) == {""}


def test_own_names_come_first(tmp_path):
    (tmp_path/"t.csv").write_text(
        "path,label,patient,mask,split,image,class,subject,seg,set\na.png,0,P,,train,b.png,1,Q,c.png,test\n")
    rows, taken = name_columns(csv_rows(tmp_path/"t.csv"), "t.csv")
    # the mask column is empty
    assert taken == {"mask": "seg"} and rows.patient.tolist() == ["P"] and rows["class"].tolist() == ["1"]


def test_checked_table_without_a_patient_column_does_not_leak(cohort):
    table = load_table(TableData(str(write(cohort, "path,label,Patient", lambda *v: ",".join(map(str, v))))))
    assert check_table(table) is table


def rows_of(tmp_path, head, row, n=24):
    "A CSV of n pictures that need not be there"
    (tmp_path/"t.csv").write_text("\n".join([head, *(row(i) for i in range(n))]))
    return read_table(tmp_path/"t.csv")


def test_one_patient_under_two_spellings(tmp_path):
    "pandas writes 12.0 for 12 where a column has gaps"
    table = rows_of(tmp_path, "path,label,patient", lambda i: f"{i}.png,0,{i // 2}" + ".0" * (i % 2))
    assert table.patient.nunique() == 12 and table.attrs["told"] == []
    table = rows_of(tmp_path, "path,label,patient", lambda i: f"{i}.png,0,{'P' if i % 2 else 'p'}0{i // 2}")
    assert "24 patients differ from another only in case, blanks or leading zeros" in table.attrs["told"][0]


def test_unknown_is_nobody(tmp_path):
    table = rows_of(tmp_path, "path,label,patient", lambda i: f"{i}.png,0,{'unknown' if i < 3 else i}")
    assert table.patient.nunique() == 24 and "the patient of 3 scans is a word" in table.attrs["told"][0]


def test_a_topic_is_no_patient_and_a_question_no_mask(tmp_path):
    table = rows_of(tmp_path, "path,label,subject,Mask?", lambda i: f"{i}.png,0,chest,{i % 2}")
    assert table.patient.nunique() == 24 and (table["mask"] == "").all()
    table = rows_of(tmp_path, "path,label,Subject", lambda i: f"{i}.png,0,S1")   # all scans of one person
    assert table.patient.nunique() == 1


def test_two_columns_that_may_be_the_patient(tmp_path):
    table = rows_of(tmp_path, "path,label,patient,Patient ID", lambda i: f"{i}.png,0,{i},{i // 2}")
    assert table.attrs["told"] == ["patient is read from the column 'patient'; 'Patient ID' groups the scans otherwise"]
    table = rows_of(tmp_path, "path,label,ID,study_id", lambda i: f"{i}.png,0,{i // 2},{i // 3}")
    assert table.attrs["told"][0].endswith("it may be 'ID' or 'study_id'")


@pytest.mark.parametrize("name", ["pat", "Pat-ID", "Pseudonym", "anon_id", "subject_identifier", "Patientennummer"])
def test_more_names_of_a_patient(tmp_path, name):
    assert rows_of(tmp_path, f"path,label,{name}", lambda i: f"{i}.png,0,{i // 2}").patient.nunique() == 12
